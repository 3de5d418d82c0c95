"""What records say: self-knowledge, comparisons of arms with intervals and costs, figures, the report, studies."""
