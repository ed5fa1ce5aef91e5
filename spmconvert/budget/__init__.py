"""A budget: candidates of every layer, what each loses, and the choice that loses least within the limit."""
