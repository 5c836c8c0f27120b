"""Networks and their two forms: multi-branch to train, folded to deploy.

`block` and `network` are RepVGG, `features` is RepVGG as a backbone, `registry` has the variants,
`forms` and `multi_branch` switch between the forms, `over_parameterize` gives any network's
convolutions branches.
"""

from repvgg.models.block import QARepVGGBlock, RepVGGBlock
from repvgg.models.features import RepVGGFeatures
from repvgg.models.forms import deployed_form, is_deployed, switch_to_deploy
from repvgg.models.multi_branch import switch_to_train
from repvgg.models.network import RepVGG
from repvgg.models.over_parameterize import over_parameterize
from repvgg.models.reestimate import reestimate_bn
from repvgg.models.registry import build_model, create_model, list_models
from repvgg.reparam import Reparameterizable, is_reparameterizable

__all__ = [
    "QARepVGGBlock",
    "RepVGG",
    "RepVGGBlock",
    "RepVGGFeatures",
    "Reparameterizable",
    "build_model",
    "create_model",
    "deployed_form",
    "is_deployed",
    "is_reparameterizable",
    "list_models",
    "over_parameterize",
    "reestimate_bn",
    "switch_to_deploy",
    "switch_to_train",
]
