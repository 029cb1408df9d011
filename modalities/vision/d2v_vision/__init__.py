"""d2v_vision: data2vec for images, as a plugin of d2v_core."""
