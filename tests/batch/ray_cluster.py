"""A Ray cluster of three nodes on this machine, for tests: obeys lines of stdin, tells lines.

`kill` takes one away at once, `other FOLDER` adds one that finds the mmchat in FOLDER first.
"""

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

SMALL = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    nodes = [cluster.add_node(**SMALL) for _ in range(2)]
    print("at", cluster.address, flush=True)
    for line in sys.stdin:
        command, _, folder = line.strip().partition(" ")
        if command == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            os.environ["PYTHONPATH"] = folder
            nodes.append(cluster.add_node(**SMALL))
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
