"""`python -m crowdmesh_jax.cli`: the same as `crowdmesh`."""

import sys

from . import main

sys.exit(main())
