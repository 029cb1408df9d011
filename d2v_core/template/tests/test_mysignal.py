"""d2v's promises, held against this modality: one test for each."""

from d2v_core.testing import Conformance


class TestMySignal(Conformance):
    modality = "mysignal"
