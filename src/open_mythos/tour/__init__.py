"""The guided tour: the tutorial's nine parts on real training."""
