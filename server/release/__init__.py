"""Release: signs a model with its manifest, and publishes it under a new version.

In: a `Draft`. Out: a signed release in a repository of The Update Framework (TUF). Start with
`publish`; `registry` is the repository.
"""
