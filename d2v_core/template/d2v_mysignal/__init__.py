"""mysignal for d2v. Empty on purpose: d2v imports `d2v_mysignal.plugin`, and that must stay quick."""
