"""What follows a run: the terminal, TensorBoard, W&B, Trackio, or a tracker of the user's.

`tracker` has the protocol and the terminal's progress line, `trackers` starts TensorBoard, W&B or Trackio in processes of their own
(`recorders`), `signals` turns Ctrl-C into an orderly end.
"""

TRACKING = "tracking"
"""Folder in a run directory for TensorBoard, W&B and Trackio; no manifest lists it."""
