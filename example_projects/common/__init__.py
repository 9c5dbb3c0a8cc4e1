"""What the example projects share: runs that can be resumed, and reports."""
