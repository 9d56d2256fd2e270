"""What recipe distill is made of: the teacher, where its tokens and the student's meet, and the terms of the loss."""
