"""Proposal calibration: excitation backprop, attention and heat-maps, dense CRF, and the chain of them."""

from labelpenet.calibration.calibrate import Candidates, Chosen, Trace, calibrate, choose_instances, proposal_candidates
from labelpenet.calibration.crf import DenseCRF, dense_crf
from labelpenet.calibration.excitation import excitation_backprop, forward_with_activations
from labelpenet.calibration.maps import heat_map, project_maps

__all__ = [
    "Candidates",
    "Chosen",
    "DenseCRF",
    "Trace",
    "calibrate",
    "choose_instances",
    "dense_crf",
    "excitation_backprop",
    "forward_with_activations",
    "heat_map",
    "project_maps",
    "proposal_candidates",
]
