"""The app's front door: `python app.py --runs runs`, the same as `ddpo app --runs runs`."""

import sys

from ddpo.app.frame import main

sys.exit(main(sys.argv[1:]))
