"""`python -m moejet` is the `moejet` command."""

import sys

from moejet.cli.main import main

sys.exit(main())
