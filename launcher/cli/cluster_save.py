"""`muster save ID --on CLUSTER`, on the cluster: asks the driver of a run for a checkpoint and prints the answer as one line of JSON."""

from __future__ import annotations

import json
import sys

from launcher import interrupts


def main() -> None:
    interrupts.exit_on_signals()
    from launcher import runs, save_now, sealed
    from training.errors import MusterError

    sealed.open_environment()
    try:
        answer = save_now.request(runs.find(sys.argv[1]), is_running=True)
    except (MusterError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
