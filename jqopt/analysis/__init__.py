"""What a traced model's dataflow says: axis classes, groups that share an input, and where scales can be folded."""
