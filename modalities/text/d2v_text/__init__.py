"""d2v_text: data2vec for text, as a plugin of d2v_core."""
