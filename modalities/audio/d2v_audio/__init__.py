"""d2v_audio: data2vec for speech and other sound, as a plugin of d2v_core."""
