"""d2v_video: data2vec for clips. Empty on purpose: d2v imports `d2v_video.plugin`, and that must stay quick."""
