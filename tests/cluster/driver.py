"""A command that runs stub ranks, for tests that kill: python -m tests.cluster.driver {load|decode}.

Prints `ready <pid of each rank>` when the work has begun, and at the end, as the command line would,
`problem <json>` or `interrupted`, with the exit status of that.
"""

import json
import sys
from dataclasses import asdict

from framework.cluster.session import open_session
from framework.errors import UserError
from tests.cluster import stub


def main(scenario):
    slow = {"load_steps": 400, "load_step_s": 0.05} if scenario == "load" else {}
    try:
        with open_session("local", stub.plan(2), loader=stub.LOADER) as session:
            session.load(stub.plan(2), loader=stub.LOADER)
            pids = [info.pid for info in session.describe()]
            say = iter([f"ready {' '.join(map(str, pids))}"])
            if scenario == "load":
                print(next(say), flush=True)
                session.load(stub.plan(2, **slow))
            for _ in session.stream("generate", list(range(2000)), 0.02):
                print(next(say, ""), flush=True)
    except UserError as error:
        print("problem", json.dumps([asdict(problem) for problem in error.problems]))
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
