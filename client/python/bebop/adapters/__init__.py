# SPDX-License-Identifier: Apache-2.0
"""Where learner frameworks expect a rollout engine: bebop.adapters.trl, bebop.adapters.verl, bebop.adapters.slime.

Each is imported by name and needs its framework only then; `import bebop` needs none of them. docs/adapters.md tells how to plug each in.
"""
