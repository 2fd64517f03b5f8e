"""The contract between coordinator and agents, and the little Python that both sides share."""
