//! The services that gRPC itself defines: health and reflection.

use std::collections::BTreeSet;

use plywood::grpc::pb;
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::{v1, v1alpha};

use super::common::Plyd;

const HEALTH: &str = "grpc.health.v1.Health";

/// plyd's own services, as its protocol files declare them.
fn declared() -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(pb::DESCRIPTORS).unwrap();
    set.file
        .iter()
        .flat_map(|file| {
            let service = |service: &prost_types::ServiceDescriptorProto| {
                format!("{}.{}", file.package(), service.name())
            };
            file.service.iter().map(service)
        })
        .collect()
}

async fn connect(plyd: &Plyd) -> Channel {
    let endpoint = Endpoint::from_shared(plyd.address()).unwrap();
    endpoint.connect().await.unwrap()
}

#[tokio::test]
async fn every_service_is_healthy() {
    let plyd = Plyd::start();
    let mut health = HealthClient::new(connect(&plyd).await);
    let services = declared();
    assert!(
        services.contains("containerd.services.snapshots.v1.Snapshots") && services.len() >= 5,
        "{services:?}"
    );
    // The empty name is the server as a whole.
    for service in services.into_iter().chain([String::new()]) {
        let request = HealthCheckRequest {
            service: service.clone(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let request = HealthCheckRequest {
        service: "plywood.v1.Nothing".to_owned(),
    };
    let status = health.check(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

/// Both versions of the protocol: older clients know only the first.
macro_rules! reflection_lists_and_describes_every_service {
    ($name:ident, $version:ident) => {
        #[tokio::test]
        async fn $name() {
            use $version::server_reflection_client::ServerReflectionClient;
            use $version::server_reflection_request::MessageRequest;
            use $version::server_reflection_response::MessageResponse;

            let plyd = Plyd::start();
            let mut reflection = ServerReflectionClient::new(connect(&plyd).await);
            let services = declared();
            let questions = std::iter::once(MessageRequest::ListServices(String::new()))
                .chain(
                    services
                        .iter()
                        .cloned()
                        .map(MessageRequest::FileContainingSymbol),
                )
                .map(|question| $version::ServerReflectionRequest {
                    host: String::new(),
                    message_request: Some(question),
                });
            let questions: Vec<_> = questions.collect();
            let mut answers = reflection
                .server_reflection_info(tokio_stream::iter(questions))
                .await
                .unwrap()
                .into_inner();
            let mut next = async || answers.message().await.unwrap().unwrap().message_response;
            let Some(MessageResponse::ListServicesResponse(list)) = next().await else {
                panic!("no list of services");
            };
            let listed: BTreeSet<String> = list
                .service
                .into_iter()
                .map(|service| service.name)
                .collect();
            assert!(listed.is_superset(&services), "{listed:?}");
            assert!(listed.contains(HEALTH), "{listed:?}");
            for service in &services {
                let Some(MessageResponse::FileDescriptorResponse(files)) = next().await else {
                    panic!("{service} is not described");
                };
                assert!(!files.file_descriptor_proto.is_empty(), "{service}");
            }
        }
    };
}

reflection_lists_and_describes_every_service!(reflection_by_version_1, v1);
reflection_lists_and_describes_every_service!(reflection_by_version_1_alpha, v1alpha);
