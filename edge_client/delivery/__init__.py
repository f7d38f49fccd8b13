"""From a repository of signed releases to an installed model. Nothing here imports torch or Flower.

Read `update` first: it fetches (`source`, `fetch`), believes what is signed (`trust`, `roots`,
`clock`), tests, and installs (`store`).
"""
