variable "bucket" {
  description = "Name of the bucket of releases and channels; the store's address is s3://<bucket>/<prefix>."
  type        = string
}

variable "prefix" {
  description = "What stands before every key, without slashes at its ends; empty for a bucket that holds nothing else."
  type        = string
  default     = "graftline"

  validation {
    condition     = !startswith(var.prefix, "/") && !endswith(var.prefix, "/")
    error_message = "The prefix has no slash at its ends, such as graftline."
  }
}

variable "lock_days" {
  description = "Days in which a version of an object cannot be deleted by anybody without s3:BypassGovernanceRetention."
  type        = number
  default     = 30

  validation {
    condition     = var.lock_days >= 1
    error_message = "At least one day: the lock is what keeps a release and its history from being rewritten."
  }
}

variable "old_version_days" {
  description = "Days after which versions that were replaced or deleted are removed; more than lock_days."
  type        = number
  default     = 90
}

variable "oidc_provider_arn" {
  description = "ARN of the identity provider of the Kubernetes cluster."
  type        = string
}

variable "oidc_issuer" {
  description = "Issuer of that provider without https://."
  type        = string
}

variable "namespace" {
  description = "Kubernetes namespace of the service accounts; each role is for the account of its name."
  type        = string
  default     = "graftline"
}
