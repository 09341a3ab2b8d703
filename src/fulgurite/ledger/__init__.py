"""Who may draw, who drew what, and at what price: in SQLite as it comes, in PostgreSQL by a URL."""

from fulgurite.ledger.ledger import Ledger, open_ledger

__all__ = ["Ledger", "open_ledger"]
