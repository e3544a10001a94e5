"""The losses of Algorithm 3: `divergence` (KL at the loss positions), `reconstruction` (eqs. 2, 3, 5 to 8), `faithfulness` and
`minimality` (eq. 1), and those that the paper does not have: `local`, `elsewhere`, `adversarial`, `smooth_minimality`. `loss` has the
registry in which each file registers its losses.

To add a loss, add a file here, which is imported automatically, and a coefficient in `settings.Losses`.
"""

from importlib import import_module
from pkgutil import iter_modules

from paramlens.method.losses.loss import LOSSES
from paramlens.method.settings import LOSS_NAMES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

if set(LOSSES) != set(LOSS_NAMES):
    raise ImportError(
        f"losses without a coefficient in settings.Losses: {sorted(set(LOSSES) - set(LOSS_NAMES))}; "
        f"coefficients without a loss in method/losses: {sorted(set(LOSS_NAMES) - set(LOSSES))}"
    )
