"""The switch of the fast paths: code that is faster than torch's or diffusers' own, and relies on their private parts.

Set `T2I_FAST_PATHS=0` in the environment to turn all of them off, for instance if an update of torch breaks one.
Results then differ by rounding. The fast paths are:

- `t2i.networks.linear`: linear layers on processors by oneDNN.
- `t2i.networks.unet_steps`: steps of U-Nets whose condition is prepared once, with weights in oneDNN's order.
- `training.common.cpu`: attention in fp32 where it is in bf16, and memory that a training run keeps.
"""

import os

enabled = os.environ.get("T2I_FAST_PATHS") != "0"
