"""What an operator can choose: the table of strategies, made from the code."""
