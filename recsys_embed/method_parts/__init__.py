"""Parts of several methods: sizes of partitions, widths by popularity, pruned columns, plans with a shared table."""
