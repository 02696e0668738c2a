output "store" {
  description = "Address for pipelines.yaml: release.store."
  value       = "s3://${aws_s3_bucket.store.id}${var.prefix == "" ? "" : "/${var.prefix}"}"
}

output "roles" {
  description = "ARN of each role, for the annotations in infra/k8s/accounts.yaml."
  value       = { for name, role in aws_iam_role.store : name => role.arn }
}

output "signing_key" {
  description = "ARN of the secret for the builder's private key."
  value       = aws_secretsmanager_secret.signing_key.arn
}
