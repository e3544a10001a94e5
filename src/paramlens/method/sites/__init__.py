"""Sites: the weight matrices of a model that are decomposed, each as W [d_in, d_out] in `y = x @ W + bias`.

Read `site` first: the interface of every kind of site, its product and its place. Then the kinds, one file each:
`linear` (with `fused`, the slices of a fused projection), `parameter` (with `standin`, how a product without a module is replaced),
`embedding`, `experts`. `find` chooses a model's sites by patterns.
"""

from paramlens.method.modes import at_rest
from paramlens.method.sites.find import find_sites, named_sites
from paramlens.method.sites.site import Place, Product, Site, TargetRows, aligned, by_place, replaced, watched

__all__ = ["Place", "Product", "Site", "TargetRows", "aligned", "at_rest", "by_place", "find_sites", "named_sites", "replaced", "watched"]
