"""What was trained, in use: text, predictions and numbers from the folder that training wrote."""
