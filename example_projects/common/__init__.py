"""What the example projects share: runs that can be resumed, reports, and what all image projects are made of."""
