"""Who is told how a run goes.

`tracker` has the protocol and the terminal's progress line, `trackers` starts TensorBoard, W&B or Trackio in processes of their own
(`recorders`), `signals` turns Ctrl-C into an orderly end.
"""

TRACKING = "tracking"
"""What TensorBoard, W&B and Trackio keep of a run: no part of what is promised of it, and in no manifest."""
