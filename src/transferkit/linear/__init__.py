"""Linear heads solved to their optimum: regularized logistic regression on features, and its calibration.

May import `features` and what lies below it, and not `training`: a loss is any object with the methods of
`linear.logistic.Loss`.
"""
