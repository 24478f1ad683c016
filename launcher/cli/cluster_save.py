"""`muster save ID --on CLUSTER`, on the cluster: asks the driver of a run for a checkpoint
and prints the answer as one line of JSON."""

from __future__ import annotations

import json
import sys

from launcher.driver import signals


def main() -> None:
    signals.exit_on_signals()
    from launcher.runfolder import run_folder, save_request
    from launcher.submit import sealed_env
    from training.errors import MusterError

    sealed_env.open_environment()
    try:
        answer = save_request.request(run_folder.find(sys.argv[1]), is_running=True)
    except (MusterError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
