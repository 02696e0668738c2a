# One role a job, with the folders of the store that it needs. Nobody may delete a version: that is what the lock and
# the lifecycle are for.
locals {
  prefix       = var.prefix == "" ? "" : "${var.prefix}/"
  written_once = ["channels", "approvals", "checkpoints", "looks"]

  # `probe` is where a store is asked once whether it keeps preconditions.
  roles = {
    # Publishes releases; sees what is in production to compare with it; cannot promote. Holds what it sends.
    trainer = {
      reads   = ["releases", "channels", "checkpoints", "heads", "leases", "latest", "looks", "probe"]
      writes  = ["releases", "leases", "latest", "probe"]
      deletes = ["leases", "probe"]
    }
    # Writes channel entries after checking release and approvals; cannot change a release. Holds what it checks, and
    # notes which webhooks were told, and how often rows that only promotions see were looked at.
    promoter = {
      reads   = ["releases", "channels", "checkpoints", "heads", "approvals", "leases", "looks", "probe", "told"]
      writes  = ["channels", "checkpoints", "heads", "leases", "looks", "probe", "told"]
      deletes = ["leases", "probe"]
    }
    # People (or their tool) who sign approvals; signatures are checked against keys.yaml besides.
    approver = {
      reads   = ["releases", "channels", "checkpoints", "heads", "approvals", "probe"]
      writes  = ["approvals", "probe"]
      deletes = ["probe"]
    }
    # Serves: reads releases and channels, and says by a lease which release it holds.
    server = {
      reads   = ["releases", "channels", "checkpoints", "heads", "leases"]
      writes  = ["leases"]
      deletes = []
    }
    # `graftline gc`: deletes releases that no channel and no lease names, after saying so among the leases, and aborts
    # uploads that killed trainers left. Versions stay until the lock ends.
    cleaner = {
      reads   = ["releases", "channels", "checkpoints", "heads", "approvals", "leases", "latest"]
      writes  = ["leases"]
      deletes = ["releases", "leases"]
    }
  }
}

data "aws_iam_policy_document" "trust" {
  for_each = local.roles

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:sub"
      values   = ["system:serviceaccount:${var.namespace}:${each.key}"]
    }
    condition {
      test     = "StringEquals"
      variable = "${var.oidc_issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "store" {
  for_each = local.roles

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.store.arn]
    # IfExists: a request for one key has no prefix. Without the right to list, S3 answers 403 for a key that is not
    # there, and "no such entry yet" is what a promoter has to see.
    condition {
      test     = "StringLikeIfExists"
      variable = "s3:prefix"
      values   = [for folder in each.value.reads : "${local.prefix}${folder}/*"]
    }
  }

  # What was sent of a file in parts: to go on with it, or to remove it. It has no condition on a prefix.
  dynamic "statement" {
    for_each = contains(concat(each.value.writes, each.value.deletes), "releases") ? [1] : []
    content {
      sid       = "ListUploads"
      actions   = ["s3:ListBucketMultipartUploads"]
      resources = [aws_s3_bucket.store.arn]
    }
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for folder in each.value.reads : "${aws_s3_bucket.store.arn}/${local.prefix}${folder}/*"]
  }

  dynamic "statement" {
    for_each = length(each.value.writes) > 0 ? [each.value.writes] : []
    content {
      sid       = "Write"
      actions   = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
      resources = [for folder in statement.value : "${aws_s3_bucket.store.arn}/${local.prefix}${folder}/*"]
    }
  }

  dynamic "statement" {
    for_each = length(each.value.deletes) > 0 ? [each.value.deletes] : []
    content {
      sid       = "Delete"
      actions   = ["s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
      resources = [for folder in statement.value : "${aws_s3_bucket.store.arn}/${local.prefix}${folder}/*"]
    }
  }

  statement {
    sid       = "Encryption"
    actions   = length(each.value.writes) > 0 ? ["kms:Decrypt", "kms:GenerateDataKey"] : ["kms:Decrypt"]
    resources = [aws_kms_key.store.arn]
  }
}

resource "aws_iam_role" "store" {
  for_each           = local.roles
  name               = "graftline-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.trust[each.key].json
}

resource "aws_iam_role_policy" "store" {
  for_each = local.roles
  name     = "store"
  role     = aws_iam_role.store[each.key].id
  policy   = data.aws_iam_policy_document.store[each.key].json
}
