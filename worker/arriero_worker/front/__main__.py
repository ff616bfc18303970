import sys

from arriero_worker.front.main import main

sys.exit(main())
