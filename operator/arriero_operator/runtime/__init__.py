"""What runs the operator: the cluster's API, what is seen of it, the engines' own words, and rounds of passes."""
