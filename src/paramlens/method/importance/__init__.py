"""Causal importance g = σ(γ(x)) in [0, 1]: for every token, how much of each subcomponent the output needs (§4.1, eq. 4).

γ maps the site inputs of the *target*, never of a masked run, to one pre-activation per subcomponent. Read `sigmoids` (pre-activations
to g, and to minimality's input), `kind` (the interface of all γ kinds), then the kinds: `scalar`, `vector`, `attention` (eq. 4,
Algorithm 1), our `shared` and `attention_shared`, and `transformer`, one network for all sites; last `network` (γ of all sites).
`settings` has γ's fields of a configuration and the registry of kinds.
"""
