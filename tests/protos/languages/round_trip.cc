// Reads the bytes of a ConnectRequest from stdin, compares them with the hello of test_generated_code.py, builds the same
// hello from nothing and writes its bytes to stdout.
#include <iostream>
#include <iterator>
#include <string>

#include "fedloom/v1/artifact.pb.h"
#include "fedloom/v1/control.pb.h"
#include "fedloom/v1/enrolment.pb.h"
#include "fedloom/v1/plan.pb.h"

int main() {
  const std::string bytes(std::istreambuf_iterator<char>(std::cin), {});
  fedloom::v1::ConnectRequest received;
  if (!received.ParseFromString(bytes)) return 10;
  if (received.step_case() != fedloom::v1::ConnectRequest::kHello) return 11;

  fedloom::v1::ConnectRequest made;
  auto* hello = made.mutable_hello();
  hello->set_protocol_version(1);
  hello->set_software("fedloom é 0.1");
  hello->add_protections(fedloom::v1::PROTECTION_ENCRYPTED);
  hello->add_protections(fedloom::v1::PROTECTION_PLAIN);
  for (int i = 0; i < 32; ++i) hello->mutable_exchange_key()->mutable_public_key()->push_back(static_cast<char>(i * 8));

  if (received.hello().software() != hello->software()) return 12;
  if (received.hello().protections_size() != 2) return 13;
  if (received.hello().exchange_key().public_key() != hello->exchange_key().public_key()) return 14;
  std::cout << made.SerializeAsString();
  return 0;
}
