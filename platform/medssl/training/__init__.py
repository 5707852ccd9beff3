"""Training that runs without Ray: plan, feed, step, loop."""
