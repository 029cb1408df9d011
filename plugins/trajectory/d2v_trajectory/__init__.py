"""d2v_trajectory: data2vec for agents. Empty on purpose: d2v imports `d2v_trajectory.plugin`, which must stay quick."""
