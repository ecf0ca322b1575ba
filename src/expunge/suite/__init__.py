"""Problems × requests × methods × audits × seeds as content-keyed jobs."""
