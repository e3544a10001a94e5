"""Report the progress of a run to the terminal, TensorBoard, W&B, Trackio, or the user's own tracker.

`tracker` has the protocol and the terminal's progress line, `trackers` starts TensorBoard, W&B or Trackio in their own processes, which
run `recorders`, and `signals` lets a run finish its step after Ctrl-C.
"""

TRACKING = "tracking"
"""Folder in a run directory for TensorBoard, W&B and Trackio. No manifest lists its files."""
