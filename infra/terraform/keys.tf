# Public keys are registered in keys.yaml in the repository, where every change is reviewed. Here lies the one private
# key that a machine uses, the builder's; approvers keep theirs on their own machines. The value is put in by hand, once:
#   aws secretsmanager put-secret-value --secret-id graftline/signing-key --secret-string file://builder
resource "aws_secretsmanager_secret" "signing_key" {
  name                    = "graftline/signing-key"
  description             = "Private key that releases in ${var.bucket} are signed with; its public key is in keys.yaml"
  kms_key_id              = aws_kms_key.store.arn
  recovery_window_in_days = 30
}

data "aws_iam_policy_document" "signing_key" {
  statement {
    sid       = "Sign"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_secretsmanager_secret.signing_key.arn]
  }
}

resource "aws_iam_role_policy" "signing_key" {
  name   = "signing-key"
  role   = aws_iam_role.store["trainer"].id
  policy = data.aws_iam_policy_document.signing_key.json
}
