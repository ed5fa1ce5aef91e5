"""The SPM operator: its geometry in integers, the reference, the merged form, the dispatch and the layer."""
