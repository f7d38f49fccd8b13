"""SuperNodes of stock Flower in threads of one process, over Flower's own connection.

They train nothing: each answers with the weights that it got, a little changed.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from functools import partial

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supernode.fleet_http_connection import http_request_response

from fedcore.flower.identity import assume_identity

_one_at_a_time = threading.Lock()
"""Making a reply takes several copies of it; so many nodes in one process would take them all."""


def node(address: str, place: int, together: threading.Barrier | None) -> None:
    """Answers what it is asked, forever; where ``together``, once all have their reply ready."""
    with http_request_response(address, insecure=True) as connection:
        _, receive, send, _, _, pull, push, confirm = connection
        while True:
            found = receive()
            if found is None:
                time.sleep(1.0)
                continue
            bare, tree = found
            run_id = bare.metadata.run_id
            sent = [one.object_id for one in iterate_object_tree(tree)]
            contents = pull_objects(sent, partial(pull, run_id))  # comes again for what is late
            confirm(run_id, tree.object_id)
            with _one_at_a_time:
                content = inflate_object_from_contents(tree.object_id, contents).content
                reply = Message(_changed(content, place), reply_to=bare)
                del content, contents
                with no_object_id_recompute():
                    reply.metadata.__dict__["_message_id"] = reply.object_id
                    objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
                ready = {object_id: each.deflate() for object_id, each in objects.items()}
                del objects
            if together is not None and together.wait() == 0:
                print(json.dumps({"event": "pushing", "at_s": time.monotonic()}), flush=True)
            wanted, session = send(reply, tree, 0.0)
            for object_id in list(ready):
                each = ready.pop(object_id)
                if object_id in wanted:
                    push(run_id, session, object_id, each)
            del reply, ready


def _changed(content: RecordDict, place: int) -> RecordDict:
    rng = np.random.default_rng(place)
    arrays = ArrayRecord(
        {
            name: Array(rng.random(array.shape, np.float32))
            for name, array in content["arrays"].items()
        }
    )
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100})})


def main() -> None:
    """Runs until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--together", action="store_true", help="push once all are ready")
    options = parser.parse_args()
    assume_identity(1)
    together = threading.Barrier(options.count) if options.together else None
    threads = [
        threading.Thread(target=node, args=(options.superlink, place, together))
        for place in range(options.count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
