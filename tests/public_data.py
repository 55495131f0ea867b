"""Where the public data sets that some tests read are: in $HONE_DATA, by default ../shared/data beside the repository."""

import os
from pathlib import Path

DATA = Path(os.environ.get("HONE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
ABSENT = f"the public data is not in {DATA}; $HONE_DATA says where it is"
