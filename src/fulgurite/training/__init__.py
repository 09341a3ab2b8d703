"""How the embedded model is made: data, autoencoder, teacher."""
