"""How the embedded model is made: data, autoencoder, text encoders, teacher, students, decoders, their evaluation."""
