"""Faster layers for a device, each beside the plain torch of fulgurite.models that it stands for."""
